"""One module per command, each with ``run(args)``. Imported only when its command is called, so that help is quick."""
