"""Pure functions from counts to the numbers in the report, each with its control."""
