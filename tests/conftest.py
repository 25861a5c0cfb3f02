"The last line of a run says how many tests passed and failed, and nothing else."


def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None: return
    passed, failed, broken = (len(reporter.stats.get(kind, ()))
                              for kind in ("passed", "failed", "error"))
    print(f"{passed} passed, {failed + broken} failed", flush=True)
