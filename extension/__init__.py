"""The WebUI extension's glue: what the page shows, what callers send, and when the library merges.

It is loaded under the name ``tome_sampler_extension``, because a package named ``extension`` is shared by name between
all extensions of a WebUI. Only ``run``, ``ui``, ``tab``, ``xyz``, ``settings`` and ``api`` import the host; ``fields``,
``request`` and ``infotext`` are plain Python.
"""
