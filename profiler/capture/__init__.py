"""Capture options, the protocol with vLLM's workers, and turning a finished capture into a trace."""
