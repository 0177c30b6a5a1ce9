"""Nothing a template or its values hold leads out of the output root or gives a name that some system refuses."""

import time
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luna_pictures.filenames import (
    MAX_DEPTH,
    check_template,
    contained,
    inside,
    model_variables,
    name_key,
    numbered,
    picture_name,
    render,
    room_below,
    safe_name,
    unknown_variables,
)
from luna_protocol.errors import Malformed

NASTY = st.one_of(
    st.text(max_size=300),
    st.text(alphabet="./\\:%\0 \n~$-conCON1.", max_size=40),
    st.sampled_from(["..", "../../etc/passwd", "C:\\Windows", "\\\\server\\share", "/etc", "nul", "COM¹", "aux.png"]),
    st.sampled_from(["a" * 999, "é" * 200, "%time:../..%", "%model_path%/../x", "~root", "a/./b", "trailing. "]),
    st.sampled_from(["\u202egnp.exe", "\ud800"]),
)
VARIABLES = ("model_name", "model_path", "model_dir", "index", "seed", "width", "height", "batch")
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³")}


def assert_safe(path: PurePosixPath) -> None:
    assert not path.is_absolute()
    assert len(path.parts) <= MAX_DEPTH
    for part in path.parts:
        assert part not in ("", ".", "..")
        assert not set(part) & set('<>:"/\\|?*\0\n\r\t\x7f')
        assert part == part.strip() and not part.endswith(".") and not part.startswith(".")
        assert part.split(".")[0].rstrip().casefold() not in DEVICES
        assert len(part.encode()) <= 255


@settings(max_examples=60)
@given(template=NASTY, values=st.lists(NASTY, min_size=len(VARIABLES), max_size=len(VARIABLES)))
def test_a_rendered_path_is_relative_and_every_part_of_it_safe(template, values):
    for text in (template, "%model_path%/%model_dir%/%seed%_" + template):
        assert_safe(render(text, dict(zip(VARIABLES, values, strict=True)), 0.0))
        check_template(contained(text))


@given(values=st.lists(NASTY, min_size=len(VARIABLES), max_size=len(VARIABLES)))
def test_what_variables_hold_is_made_safe_and_never_refused(values):
    template = "x_" + "_".join(f"%{name}%" for name in VARIABLES if name not in ("model_path", "model_dir"))
    assert_safe(render(template, dict(zip(VARIABLES, values, strict=True)), 0.0))


@given(text=NASTY)
def test_a_safe_name_stays_as_it_is(text):
    assert safe_name(safe_name(text)) == safe_name(text)


@given(stem=NASTY, affix=st.text(max_size=64), row=st.none() | st.integers(0, 63), number=st.integers(0, 99_999))
def test_a_picture_name_fits_every_file_system(stem, affix, row, number):
    path = picture_name(PurePosixPath("a"), stem, affix, row, "webp")
    assert_safe(numbered(path, number))
    assert path.suffix == ".webp"


@given(a=NASTY, b=NASTY)
def test_names_that_a_file_system_may_take_for_one_have_one_key(a, b):
    a, b = safe_name(a), safe_name(b)
    if a.casefold() == b.casefold():
        assert name_key(PurePosixPath(a)) == name_key(PurePosixPath(b))


def test_accents_composed_or_not_are_one_name():
    assert name_key(PurePosixPath("caf\u00e9")) == name_key(PurePosixPath("CAFE\u0301"))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("../x", "leaves"),
        ("a/../../x", "leaves"),
        ("/etc/x", "absolute"),
        ("C:\\x", "absolute"),
        (" c:/D:/x", "absolute"),
        ("\\\\host\\x", "absolute"),
        ("\u3000\\\u00a0../x", "leaves|absolute"),
        ("x" * 600, "600 characters"),
    ],
)
def test_a_template_that_leads_elsewhere_is_refused(template, told):
    with pytest.raises(Malformed, match=told) as refused:
        check_template(template)
    assert refused.value.hint
    check_template(contained(template))
    assert_safe(render(template, {}, 0.0))


def test_variables_and_time():
    created = time.mktime((2031, 2, 3, 4, 5, 6, 0, 0, -1))
    variables = model_variables("SDXL\\photo\\dream.v2.safetensors") | {"seed": 7}
    assert variables["model_name"] == "dream.v2"
    path = render("%model_dir%/%time:YYYY_mm_dd.HH.MM.SS%_%model_name%_%seed%", variables, created)
    assert path == PurePosixPath("SDXL/photo/2031_02_03.04.05.06_dream.v2_7")
    assert render("%model_path%", variables, created) == PurePosixPath("SDXL/photo/dream.v2")
    assert render("100% of it", {}, created) == PurePosixPath("100% of it")


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("%date:yyyy-MM-dd%", "2031-02-03"),
        ("%date:yyyy/MM%/x", "2031/02/x"),
        ("%date:yy.M.d_hh:mm:ss%", "31.2.3_04_05_06"),
        ("%year%%month%%day%-%hour%%minute%%second%", "20310203-040506"),
        ("%batch_num%_%width%", "3_64"),
        ("%KSampler.seed%", "%KSampler.seed%"),
        ("50%off%seed%", "50%off7"),
        ("a:b", "a_b"),
        ("\u3000x\u00a0", "x"),
        ("tail\u00a0.", "tail"),
        ("\U0001f469\u200d\U0001f680", "\U0001f469_\U0001f680"),
        ("/".join("abcdefghijklmnopqrst"), "a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/t"),
    ],
)
def test_templates_of_save_image_and_whatever_people_type(template, path):
    created = time.mktime((2031, 2, 3, 4, 5, 6, 0, 0, -1))
    assert render(template, {"seed": 7, "width": 64, "batch_num": 3}, created) == PurePosixPath(path)


def test_what_looks_like_a_variable_and_is_none_is_found():
    known = ["seed", "model_name"]
    assert unknown_variables("%seed%/%time:YYYY%_%date:yyyy-MM-dd%_%day%_100% of it", known) == []
    assert unknown_variables("%sed%_%KSampler.seed%/%Seed%", known) == ["%sed%", "%KSampler.seed%", "%Seed%"]


@pytest.mark.parametrize("room", [150, 199, 1000])
def test_long_names_are_cut_until_the_path_fits(room):
    # Windows takes 260 characters for a whole path; 199 are left below C:/Users/.../ComfyUI/output.
    folder = PurePosixPath(*("\u65e5" * 60 + str(n) for n in range(5)))
    path = picture_name(folder, "x" * 300, "FINAL", 7, "webp", room)
    assert path.name.endswith("_FINAL_07.webp") and len(path.parts) == 6
    while_written = path.parent / "_discarded" / f".{'0' * 32}.12.10.part"
    for longest in (numbered(path.parent / "_discarded" / path.name, 12_345), while_written):
        assert len(str(longest).encode()) <= room
        assert_safe(path)
    assert picture_name(PurePosixPath("a"), "x", "", None, "png", room) == PurePosixPath("a/x.png")


def test_windows_takes_260_characters_for_a_whole_path(monkeypatch):
    root = Path("C:/Users/somebody/ComfyUI/output")
    assert room_below(root) == 1000
    monkeypatch.setattr("luna_pictures.filenames.os", SimpleNamespace(name="nt"))
    path = picture_name(PurePosixPath("a" * 180), "b" * 180, "FINAL", 3, "webp", room_below(root))
    assert len(f"{root}/{numbered(path, 12_345)}") < 260 and path.name.endswith("_FINAL_03.webp")


def test_a_link_out_of_the_root_is_refused(tmp_path):
    root = tmp_path / "output"
    (tmp_path / "elsewhere").mkdir()
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "file").write_text("")
    assert inside(root, PurePosixPath("new/deep/x.png")) == root / "new" / "deep" / "x.png"
    with pytest.raises(Malformed, match="leads out"):
        inside(root, PurePosixPath("link/new/x.png"))
    with pytest.raises(Malformed, match="not a folder"):
        inside(root, PurePosixPath("file/x.png"))
    with pytest.raises(Malformed, match="too long"):
        inside(root, PurePosixPath("/".join(["a" * 200] * 10)))
