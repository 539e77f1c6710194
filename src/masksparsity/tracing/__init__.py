"""One run of a network on channel labels, operation by operation. Imports torch alone."""
