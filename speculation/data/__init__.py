"""The data that predictors learn from: routes of a trace, prediction tasks, histories, repeated tokens, router inputs."""
