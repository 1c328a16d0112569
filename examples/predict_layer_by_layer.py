"""Use a trained predictor as a runtime would: layer by layer, while the routes become known.

specmoe train traces/math --predictor mlp --out runs/mlp
python examples/predict_layer_by_layer.py runs/mlp traces/math
"""

from __future__ import annotations

import sys

from profiler import Trace
from speculation import History, Task, load_predictor


def main() -> None:
    predictor, trace = load_predictor(sys.argv[1]), Trace.open(sys.argv[2])
    shape = predictor.shape
    if shape.task != Task.NEXT_LAYER:
        sys.exit(f"{sys.argv[1]} predicts {shape.task}: train one with --task next-layer")
    # The first problem of the trace takes the place of a running model.
    recorded, vocab_ids = trace.arrays(0), trace.tokens["vocab_id"].to_numpy()
    weights_TLK = recorded.weights_TLK
    if weights_TLK is None:
        sys.exit(f"{trace.path} has no routing weights, which a running model would give")
    history, found, chosen = History(shape), 0, 0
    for position in range(len(recorded)):
        history.begin(int(vocab_ids[position]))
        for layer in range(shape.layers - 1):
            history.add(recorded.expert_ids_TLK[position, layer], weights_TLK[position, layer])
            prediction = predictor.predict(history)
            # A runtime would begin to copy these experts now; row 0 is the next layer, row h the one h + 1 layers ahead.
            prefetched = prediction.expert_ids[0, : shape.top_k]
            found += len(set(prefetched) & set(recorded.expert_ids_TLK[position, layer + 1]))
            chosen += shape.top_k
        history.add(recorded.expert_ids_TLK[position, -1], weights_TLK[position, -1])
    recall, chance = found / chosen, shape.top_k / shape.experts
    print(f"{found} of {chosen} experts were predicted one layer ahead: {recall:.3f} (chance {chance:.3f})")
    print("The run may have been trained on this problem: 'specmoe evaluate' uses problems that it was not trained on.")


if __name__ == "__main__":
    main()
