"""The embedded demo: a small trained Mixtral (`model/`), prompts (`prompts/`), and how the model was trained."""
