"""The embedded demo: a small trained Mixtral (`model/`), prompts (`prompts/`), and the script that trained the model."""
