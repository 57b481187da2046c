"""The pool of settings: predicted time of each, and switching between them."""
