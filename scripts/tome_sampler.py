"""ToMe Sampler for AUTOMATIC1111 and Forge: hands the host's hooks on to the package ``extension``."""

import importlib.util
import sys
from pathlib import Path

from modules import scripts

NAME = "tome_sampler_extension"  # of its own: other extensions may have a package named `extension` too
ROOT = Path(__file__).resolve().parent.parent


def load():
    """The package ``extension``, executed anew at each load as the host does with this file."""
    for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
        del sys.modules[name]
    folder = ROOT / "extension"
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    sys.path.insert(0, str(ROOT))  # the library, if the host has not put this folder there itself
    try:
        spec.loader.exec_module(package)
        return importlib.import_module(NAME + ".app")
    finally:
        sys.path.remove(str(ROOT))


app = load()
app.register()


class ToMeSampler(scripts.Script):
    """The host's side of it: one object a tab, shared by all requests."""

    def title(self):
        return app.TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        components, self.infotext_fields, self.paste_field_names = app.controls(self.elem_id, is_img2img)
        return components

    def setup(self, p, *args):
        app.guard(p)

    def before_process(self, p, *args):
        app.run.abort()

    def process(self, p, *args):
        app.prepare(p, args)

    def process_before_every_sampling(self, p, *args, **kwargs):
        app.begin_pass(p, kwargs["x"])

    def post_sample(self, p, ps, *args):
        app.run.end_pass()  # before face repair and the like, which run in the hooks that follow

    def postprocess(self, p, processed, *args):
        app.finish(p, processed)
