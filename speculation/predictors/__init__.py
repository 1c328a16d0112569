"""Expert predictors: `base` defines their interface, `registry` lists them by name, `features` holds what several compute."""
