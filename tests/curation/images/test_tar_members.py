"""Members of tars: no member behind an end mark is lost, and no label is wrong or lost without being counted."""

import tarfile
from collections import Counter
from pathlib import Path

import pytest

from curation.images import sources, tar_members
from curation.images.decode import RejectReason
from curation.images.sources import SourceConfig
from tests.curation.images.tars import member, tar_of

Labels = list[tuple[bytes, str | None]]


def read(path: Path, data: bytes) -> tuple[Labels, Counter[str], str | None]:
    """Data and label of each image, the counts of other members, and the damage."""
    path.write_bytes(data)
    source = SourceConfig(name="tars", path=str(path), role="pool", layout="webdataset")
    passed_over: Counter[str] = Counter()
    labels: Labels = []
    damage = None
    for item in sources.read_source(source, ("",), max_bytes=1_000, passed_over=passed_over):
        if item.problem is not None:
            assert damage is None and item.problem[0] == RejectReason.DAMAGED_ARCHIVE
            damage = item.problem[1]
        else:
            assert item.data is not None
            assert data[item.offset : item.offset + item.length] == item.data
            labels.append((item.data, item.label))
    return labels, passed_over, damage


def tar(*members: str) -> bytes:
    """A tar of these names. The text of a sidecar follows its name after `=`; an image holds its name."""
    pairs = [text.partition("=")[::2] for text in members]
    return tar_of([member(name, (text or name).encode()) for name, text in pairs], tarfile.USTAR_FORMAT)


FIRST, SECOND = tar("a.png", "a.cls=1"), tar("b.png", "b.cls=2", "a.png", "a.cls=3")


@pytest.mark.parametrize("zeros", [512, 1024, 10_240, 100_352])
def test_tars_one_behind_another_are_all_read(tmp_path: Path, zeros: int) -> None:
    data = FIRST.rstrip(b"\0")
    data += bytes(-len(data) % 512 + zeros)
    labels, passed_over, damage = read(tmp_path / "a.tar", data + SECOND + bytes(20_480))
    assert labels == [(b"a.png", "1"), (b"b.png", "2"), (b"a.png", "3")]
    assert not passed_over and damage is None


def test_other_data_behind_the_end_mark_is_damage_with_its_position(tmp_path: Path) -> None:
    labels, _, damage = read(tmp_path / "a.tar", FIRST + b"text")
    assert labels == [(b"a.png", "1")]
    assert damage is not None and f"at byte {len(FIRST)}" in damage
    labels, _, damage = read(tmp_path / "a.tar", FIRST + SECOND[:700])
    assert labels in ([(b"a.png", "1")], [(b"a.png", "1"), (b"b.png", None)]) and damage is not None


def test_zeros_behind_the_end_mark_are_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_members, "MAX_ZEROS_BEHIND_END", 2 << 20)  # instead of 1 GiB
    labels, _, damage = read(tmp_path / "a.tar", FIRST + bytes(1 << 20))
    assert labels == [(b"a.png", "1")] and damage is None
    labels, _, damage = read(tmp_path / "a.tar", FIRST + bytes(4 << 20))
    assert labels == [(b"a.png", "1")] and damage is not None and "zeros behind the end mark" in damage


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # The sidecar of the whole name, before and after its image, and of several images in one key.
        (["22.05.png", "22.05.cls=5", "22.06.png", "22.07.png", "22.07.cls=7"], ["5", None, "7"]),
        (["22.05.cls=5", "22.05.png", '22.06.json={"label": 6}', "22.06.png"], ["5", "6"]),
        # Else that of the key.
        (["a.left.png", "a.right.png", "a.right.cls=2", "a.cls=1"], ["1", "2"]),
        # A .cls wins over a .json, in any order.
        (['a.json={"label": "j"}', "a.png", "a.cls=c"], ["c"]),
        (["a.cls=c", "a.png", 'a.json={"label": "j"}'], ["c"]),
        # Members that are neither image nor sidecar do not part a sample.
        (["a.png", "b.npy=x", "._a.cls=wrong", "a.cls=1"], ["1"]),
        (["a.cls=1", "x/a.png", "a/b.cls=2"], [None]),
    ],
)
def test_a_label_is_that_of_the_whole_name_or_of_the_key(
    tmp_path: Path, members: list[str], expected: list[str | None]
) -> None:
    labels, _, damage = read(tmp_path / "a.tar", tar(*members))
    assert damage is None
    assert [label for _, label in labels] == expected


@pytest.mark.parametrize(
    ("members", "given"),
    [
        (["a.png", "b.png", "a.cls=1", "b.cls=2"], 2),
        (["a.cls=1", "b.cls=2", "a.png", "b.png"], 0),
        (["a.png", "a.cls=1", "b.png", "a.png", "a.cls=2"], 2),
        (["a.png", "a.cls=1", "b.png", "a.jpg"], 2),
        (["a.left.png", "b.png", "a.cls=1"], 2),
        (["a.cls=1", "a.left.png", "b.png", "a.right.png"], 2),
        (["a.png", "a.cls=1", "a.cls=2"], 1),
    ],
)
def test_a_key_that_returns_is_damage(tmp_path: Path, members: list[str], given: int) -> None:
    labels, _, damage = read(tmp_path / "a.tar", tar(*members))
    assert damage is not None and "must be neighbours" in damage and "at byte" in damage
    assert len(labels) == given and all(label in ("1", None) for _, label in labels)


def test_the_images_before_the_damage_are_given(tmp_path: Path) -> None:
    """Without labels in the sample that is open at the damage, since a sidecar may be lost."""
    whole = tar("0.png", "0.cls=0", *(word for n in range(5) for word in (f"v1.{n}.cls={n}", f"v1.{n}.png")))
    position = whole.index(b"v1.4.png")  # the header of the last image
    labels, _, damage = read(tmp_path / "a.tar", whole[:position] + b"\xff" * 512)
    assert damage is not None
    assert labels == [(b"0.png", "0"), *((f"v1.{n}.png".encode(), None) for n in range(4))]


def test_a_sample_of_many_images_keeps_the_labels_that_come_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_members, "MAX_IMAGES_IN_SAMPLE", 3)
    members = ["v1.cls=key", *(word for n in range(8) for word in (f"v1.{n}.cls={n}", f"v1.{n}.png")), "v1.x.png"]
    labels, passed_over, damage = read(tmp_path / "a.tar", tar(*members))
    assert damage is None and not passed_over
    assert [label for _, label in labels] == [*map(str, range(8)), "key"]


def test_dots_in_the_names_of_images_alone_are_no_keys(tmp_path: Path) -> None:
    names = ["3.14.png", "2.71.png", "3.99.png", "2.72.png"]
    labels, passed_over, damage = read(tmp_path / "a.tar", tar(*names))
    assert damage is None and not passed_over
    assert [data.decode() for data, _ in labels] == names


def test_sidecars_and_captions_are_counted_where_no_image_has_them(tmp_path: Path) -> None:
    long = "x" * 1_001
    members = ["0.json={}", "0.txt=caption", "0.webp", "1.cls=1", "2.txt=caption", "3.json={}", "3.cls=3"]
    members += ["4.png", "4.json=no JSON", "5.png", f"5.cls={long}", "6.png", "6.npy=x", "6.other.cls=1"]
    labels, passed_over, damage = read(tmp_path / "a.tar", tar(*members))
    assert damage is None and [label for _, label in labels] == [None] * 4
    assert passed_over == {
        "sidecars of no image": 4,
        ".txt": 1,
        "sidecars without readable text": 2,
        ".npy": 1,
    }


def test_links_and_devices_in_a_tar_are_counted(tmp_path: Path) -> None:
    kinds = {tarfile.SYMTYPE: "b.png", tarfile.LNKTYPE: "b.png", tarfile.DIRTYPE: "", tarfile.FIFOTYPE: ""}
    linked = [member(f"{kind.decode()}.png", b"", kind, linkname=target) for kind, target in kinds.items()]
    labels, passed_over, damage = read(tmp_path / "a.tar", tar_of([*linked, member("b.png", b"real")]))
    assert labels == [(b"real", None)] and damage is None
    assert passed_over == {"links": 2, "special files": 1}
