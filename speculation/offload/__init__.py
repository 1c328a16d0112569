"""What a prediction is worth when experts do not fit: caches, prefetching, and an estimate of tokens per second.

`requests` turns a trace into what a device asks for, `plans` a predictor into what is fetched ahead, `costs` a model and a
device into seconds; `kernel` plays it all, event by event; `simulate` is the way in.
"""
