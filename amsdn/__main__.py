"""``python -m amsdn`` is the ``amsdn`` command."""

import sys

from amsdn.cli import main

sys.exit(main())
