"""Finding image files whose names in a record differ in case, separators, folders or accents."""

from __future__ import annotations

import unicodedata

import pytest

from mask_head_plugin.dataset_check.image_places import ImagePlaces, locate


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    for name in (
        *("0.jpg", "images/1.jpg", "a/2.jpg", "b/2.jpg", "a/Photo.JPG", "a cat.png"),
        *("deep/er/3.jpg", "x\\4.jpg", unicodedata.normalize("NFD", "Tür.png"), ".git/5.jpg"),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("0.jpg", "0.jpg"),
        ("images/0.jpg", "0.jpg"),
        ("images\\1.jpg", "images/1.jpg"),
        ("1.jpg", "images/1.jpg"),
        ("C:\\Users\\me\\set\\a\\2.jpg", "a/2.jpg"),
        ("/home/me/set/b/2.jpg", "b/2.jpg"),
        ("2.jpg", None),  # ambiguous
        ("A/photo.jpg", "a/Photo.JPG"),
        ("./er//3.jpg", "deep/er/3.jpg"),
        ("x/4.jpg", "x\\4.jpg"),
        ("a%20cat.png", "a cat.png"),
        ("Tür.png", unicodedata.normalize("NFD", "Tür.png")),
        ("5.jpg", None),  # in a hidden folder
        ("6.jpg", None),
        ("/", None),
        ("", None),
    ],
)
def test_a_file_is_found_by_the_end_of_its_path(root, name, place):
    assert locate(root, name) == place


def test_an_exact_name_is_preferred_to_one_that_differs_in_case(tmp_path):
    for name in ("a/X.jpg", "b/x.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    places = ImagePlaces(str(tmp_path))
    assert places.locate("x.jpg") == "b/x.jpg" and places.locate("X.jpg") == "a/X.jpg"


def test_among_files_with_the_same_name_the_one_at_the_root_is_found(tmp_path):
    root = tmp_path / "day"
    for name in ("1.jpg", "more/1.jpg", "a/2.jpg", "b/2.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    places = ImagePlaces(str(root))
    assert places.locate("1.JPG") == "1.jpg"
    assert places.locate("day/1.jpg") == "1.jpg"
    assert places.locate(r"C:\set\Day\1.jpg") == "1.jpg"
    assert places.locate(r"C:\set\night\1.jpg") is None
    assert places.locate("day/more/1.jpg") == places.locate("more/1.JPG") == "more/1.jpg"
    assert places.locate("2.jpg") is None and places.namesakes("2.jpg") == ["a/2.jpg", "b/2.jpg"]


def test_linked_folders_are_searched_and_circular_links_end(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "7.jpg").write_bytes(b"")
    (tmp_path / "images" / "link").symlink_to(other)
    (other / "back").symlink_to(tmp_path / "images")
    assert locate(root, "7.jpg") == "link/7.jpg"


def test_a_missing_folder_contains_nothing(tmp_path):
    assert locate(str(tmp_path / "nowhere"), "0.jpg") is None
