"Ways of doing the same thing, timed turn by turn."
import statistics
import time


def interleaved(ways, rounds=5):
    "Seconds of each way, run in turn so that a drift of the machine's speed hits all alike."
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}
