"""Expert predictors: `base` is what all offer, `registry` names them, `features` is what several compute."""
