"""Runs the study: see `study`."""

from benchmarks.router_inputs.study import main

if __name__ == "__main__":
    main()
