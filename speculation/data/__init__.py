"""What predictors learn from: routes of a trace, tasks, histories, repeated tokens, router inputs."""
