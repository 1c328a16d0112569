"""From a running capture to a trace: options, requests, sealing."""
