"""The command line: the parser, the flags of this project, and the checks of both before any rank starts."""
