"""Pure functions that turn counts into the numbers of the report, each with its control."""
