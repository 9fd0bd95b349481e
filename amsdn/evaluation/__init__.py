"""Attack, certify and report any classifier: rows first (evaluate, certification), numbers from rows (summary), then the page."""
