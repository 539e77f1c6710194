"""The heart: which channels are coupled, which may go, and how they go. Imports torch alone."""
