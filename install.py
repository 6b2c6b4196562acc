"""Run by the WebUI at each start. The hosts bring all that ToMe Sampler needs.

Nothing is ever installed here but einops, and torch is never touched.
"""

import importlib.util


def main():
    try:
        import launch
    except ImportError:
        return
    arguments = getattr(launch, "args", None)
    if getattr(arguments, "skip_install", False) or getattr(arguments, "skip_prepare_environment", False):
        return
    if importlib.util.find_spec("einops") is None:
        launch.run_pip("install --no-deps einops", "einops for ToMe Sampler")


main()
