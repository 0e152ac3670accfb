"""How the pages of this folder become a site: docs/serve.sh, tests/docs/test_site.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs" / "_ext")]

import distclip  # noqa: E402

project, author = "distclip", "the distclip authors"
copyright = "2026, the distclip authors"
version = release = distclip.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "files_outside",
    "from_the_package",
    "plain_roles",
]
exclude_patterns = ["_build"]
root_doc = "index"
nitpicky = True
nitpick_ignore_regex = [
    # of torch and Python, whose own sites a build does not ask
    (r"py:.*", r"(torch|accelerate|deepspeed|lightning|transformers)\..*"),
    (r"py:.*", r"(collections|typing|logging|pathlib|os|enum|abc|types)\..*"),
    # types of arguments that have a name of their own, which docstrings say in words; whether a
    # public name is without a place, tests/docs/test_site.py sees
    (r"py:class", r"\w+"),
    (
        r"py:class",
        r"distclip\.(kernels\.tensor_list\.TensorList|p_norm\.PNorm|report\.trackers\._WandbRun"
        r"|testing\._ThreadMeeting)",
    ),
]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "plain"
# not imported: they take long, and need not be installed to build the pages
autodoc_mock_imports = [
    "accelerate",
    "deepspeed",
    "lightning",
    "megatron",
    "torchtitan",
    "transformers",
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False
copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = f"distclip {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
