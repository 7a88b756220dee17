import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.ops import box_iou

from mae_core.data.images import Statistics, UnreadableImage
from mae_core.data.loading import make_loader
from mae_core.errors import UserError
from transfer.detection.annotations import Category, Instance
from transfer.detection.coco import CocoImage, Part, check_same_categories, decode_masks, read_coco
from transfer.detection.config import DetectionData
from transfer.detection.data_sets import with_objects
from transfer.detection.headers import header_of
from transfer.detection.heads import Detections
from transfer.detection.masks import encode_masks
from transfer.detection.plan import print_plan
from transfer.detection.results import average_precision, coco_results
from transfer.detection.samples import (
    TrainingSamples,
    WholeImages,
    boxes_of,
    check_size,
    collate,
    collate_readable,
    cut_polygon,
    place_jittered,
    place_whole,
    read_checked,
    target_on,
)

PLAIN = Statistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory, write_coco):
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def coco(root):
    return read_coco(Part(root / "train", root / "annotations" / "instances_train.json"))


@pytest.fixture
def edited(root, tmp_path):
    """(change(content)) -> the part whose json was changed so."""

    def edit(change):
        content = json.loads((root / "annotations" / "instances_train.json").read_text())
        content = change(content) or content
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(content))
        return Part(root / "train", path)

    return edit


def detections_of_truth(coco):
    """The annotations themselves, as if a detector had found them."""
    found = []
    for index, image in enumerate(coco.images):
        boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in (i.box for i in image.instances)]).reshape(-1, 4)
        labels = torch.tensor([i.label for i in image.instances])
        codes = encode_masks(decode_masks(image, image.instances))
        found.append(Detections(index, boxes.float(), torch.full((len(labels),), 0.9), labels, codes))
    return found


# ---- reading


def test_category_ids_with_gaps_become_labels_in_their_order(coco):
    assert coco.names == ["bar", "frame", "disc"]
    assert [coco.category_id(label) for label in (1, 2, 3)] == [3, 7, 20]


def test_polygons_and_both_run_lengths_decode_to_the_same_mask(edited, coco):
    def compress(content):
        for annotation, code in zip(content["annotations"], codes, strict=True):
            annotation["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode()}

    masks = [decode_masks(image, image.instances) for image in coco.images]
    codes = [code for image_masks in masks for code in encode_masks(image_masks)]
    again = read_coco(edited(compress))
    for image, expected in zip(again.images, masks, strict=True):
        assert np.array_equal(decode_masks(image, image.instances), expected)
    kinds = {type(i.shape) for image in coco.images for i in image.instances}
    assert kinds == {tuple, bytes}  # the set has polygons and run lengths, and neither is kept as pixels


def test_masks_fill_their_boxes(coco):
    for image in coco.images:
        x1, y1, x2, y2 = boxes_of(decode_masks(image, image.instances)).T
        assert np.stack([x1, y1, x2 - x1, y2 - y1], 1).tolist() == [list(i.box) for i in image.instances]


def first(content):
    return content["annotations"][0]


WRONG = {
    "unknown category": (lambda c: first(c).update(category_id=4), r"annotation 1 has category_id 4, .*\(3, 7, 20\)"),
    "unknown image": (lambda c: first(c).update(image_id=99), "annotation 1 has image_id 99"),
    "no box": (lambda c: first(c).pop("bbox") and None, "annotation 1 has no bbox"),
    "bad box": (lambda c: first(c).update(bbox=[1, 2, -3, 4]), r"bbox \[1, 2, -3, 4\]"),
    "no mask": (lambda c: first(c).update(segmentation=[]), "annotation 1 has no segmentation"),
    "short polygon": (lambda c: first(c).update(segmentation=[[1, 2, 3, 4]]), "three or more x, y pairs"),
    "mask of another size": (
        lambda c: first(c).update(segmentation={"size": [9, 9], "counts": [81]}),
        r"mask of \[9, 9\] .*image has \[48, 64\]",
    ),
    "runs too short": (
        lambda c: first(c).update(segmentation={"size": [48, 64], "counts": [81]}),
        "runs of 81 pixels in all, but its image has 3072",
    ),
    "odd mask": (lambda c: first(c).update(segmentation={"rle": 1}), "neither polygons nor a run-length code"),
    "doubled annotation": (lambda c: c["annotations"][1].update(id=1), "annotation id 1 appears twice"),
    "doubled image": (lambda c: c["images"][1].update(id=5), "image id 5 appears twice"),
    "doubled category": (lambda c: c["categories"][1].update(id=20), "category id 20 appears twice"),
    "image without size": (lambda c: c["images"][0].pop("height") and None, "image 5 has no height"),
    "missing image": (lambda c: c["images"][2].update(file_name="no.png"), r"image id 25 is .*no\.png.*\(1 of 4 "),
    "not COCO": (lambda c: {"boxes": []}, "not COCO: it has no list of images, annotations, categories"),
    "a list": (lambda c: [1, 2], "not COCO"),
    "odd record": (lambda c: c["images"].append(3), "images holds 3 in place of a record"),
    "polygon of strings": (lambda c: first(c).update(segmentation=[["a"] * 6]), "annotation 1 has a polygon with 'a'"),
    "polygon of nan": (lambda c: first(c).update(segmentation=[[float("nan")] * 6]), "annotation 1 has a polygon with"),
    "box of nan": (lambda c: first(c).update(bbox=[1, 2, float("nan"), 4]), "annotation 1 has bbox"),
    "area in words": (lambda c: first(c).update(area="big"), "annotation 1 has area 'big'"),
    "odd crowd": (lambda c: first(c).update(iscrowd=[2]), r"annotation 1 has iscrowd \[2\]"),
    "height in words": (lambda c: c["images"][0].update(height="tall"), "image 5 has height 'tall'"),
    "no height": (lambda c: c["images"][0].update(height=0), "image 5 has height 0"),
    "endless width": (lambda c: c["images"][0].update(width=float("inf")), "image 5 has width inf"),
    "numeric file name": (lambda c: c["images"][0].update(file_name=7), "image 5 has file_name 7"),
    "list as image id": (lambda c: c["images"][0].update(id=[5]), r"image id \[5\] is not a number"),
    "ids of two types": (lambda c: c["images"][0].update(id="5"), "image id '5' is a string, but others are numbers"),
    "list as annotation id": (lambda c: first(c).update(id=[1]), r"annotation id \[1\] is not a number"),
    "list as annotation's image": (lambda c: first(c).update(image_id=[5]), r"annotation 1 has image_id \[5\]"),
    "list as category": (lambda c: first(c).update(category_id=[3]), r"annotation 1 has category_id \[3\]"),
    "size of a mask is a number": (
        lambda c: first(c).update(segmentation={"size": 9, "counts": [81]}),
        "annotation 1 has a mask of 9",
    ),
    **{
        f"counts {counts!r}": (
            lambda c, counts=counts: first(c).update(segmentation={"size": [48, 64], "counts": counts}),
            message,
        )
        for counts, message in [
            (["a", 3], "annotation 1 has run-length counts that are broken"),
            ([-3, 3075], "annotation 1 has run-length counts that are broken"),
            (7, "annotation 1 has run-length counts that are broken"),
            ("", "annotation 1 has run-length counts that are broken"),
            ("!!garbage!!", "annotation 1 has run-length counts that are broken"),
            ("\u00e9", "annotation 1 has run-length counts that are broken"),
            ("ooooooooooo1", "annotation 1 has run-length counts that are broken"),
            ("1P", "annotation 1 has run-length counts that are broken"),
            ("114", "annotation 1 has runs of 6 pixels in all, but its image has 3072"),
        ]
    },
    "no classes": (lambda c: c.update(categories=[]), "empty list of categories"),
    "nameless class": (lambda c: c["categories"][0].pop("name") and None, "category without"),
    "class called null": (lambda c: c["categories"][0].update(name=None), "category without a whole-number id and a"),
    "class called nothing": (lambda c: c["categories"][0].update(name=" "), "category without"),
    "class id of a half": (lambda c: c["categories"][0].update(id=20.5), "category without a whole-number id"),
    "class id true": (lambda c: c["categories"][0].update(id=True), "category without a whole-number id"),
    "width of a half": (lambda c: c["images"][0].update(width=64.5), "image 5 has width 64.5"),
    "image id true": (lambda c: c["images"][0].update(id=True), "image id True is not a number"),
    "box of true": (lambda c: first(c).update(bbox=[True, 2, 3, 4]), "annotation 1 has bbox"),
    "negative area": (lambda c: first(c).update(area=-5), "annotation 1 has area -5"),
    "runs of halves": (
        lambda c: first(c).update(segmentation={"size": [48, 64], "counts": [3070.5, 1.5]}),
        "annotation 1 has run-length counts that are broken",
    ),
    "image id as a string": (
        lambda c: first(c).update(image_id="5"),
        r"annotation 1 has image_id '5', which is not among the images \(5, 15, 25, ...\)",
    ),
    **{
        f"file name {name[:5]!r}": (
            lambda c, name=name: c["images"][0].update(file_name=name),
            f"image 5 has file_name {told}",
        )
        for name, told in [("", "''"), (".", r"'\.'"), ("a\0.png", r"'a\\x00\.png'"), ("a" * 999, "'a{39}.*1001 char")]
    },
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_with_file_and_id(edited, change, message):
    part = edited(change)
    with pytest.raises(UserError, match=message) as error:
        read_coco(part)
    assert str(part.annotations) in str(error.value)


def test_compressed_codes_are_accepted_whole_and_refused_cut(edited):
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        code = encode_masks(rng.random((1, 48, 64)) < density)[0]["counts"].decode()
        part = edited(lambda c, code=code: first(c).update(segmentation={"size": [48, 64], "counts": code}))
        assert read_coco(part).images[0].instances[0].shape == code.encode()
        part = edited(lambda c, code=code: first(c).update(segmentation={"size": [48, 64], "counts": code[:-2]}))
        with pytest.raises(UserError, match=r"edited\.json: annotation 1 has run"):
            read_coco(part)


def test_a_missing_json_and_a_missing_folder(root):
    annotations = root / "annotations" / "instances_train.json"
    with pytest.raises(UserError, match=r"annotation file .*nowhere\.json does not exist"):
        read_coco(Part(root / "train", root / "nowhere.json"))
    with pytest.raises(UserError, match=r"image folder .*nowhere of .*instances_train\.json does not exist"):
        read_coco(Part(root / "nowhere", annotations))


def test_a_file_that_is_not_json(root):
    with pytest.raises(UserError, match=r"000\.png is not JSON"):
        read_coco(Part(root / "train", root / "train" / "000.png"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_a_json_of_any_encoding_is_read_or_named(root, coco, tmp_path, encoding):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    content["categories"][0]["name"] = "Bär"
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    if encoding == "latin-1":
        with pytest.raises(UserError, match=r"x.json is not in UTF-8 .*'ä' in Latin-1"):
            read_coco(Part(root / "train", path))
    else:
        assert "Bär" in read_coco(Part(root / "train", path)).names


def strings_for_ids(content):
    for category in content["categories"]:
        category["id"] = str(category["id"])


def strings_in_annotations(content):
    for annotation in content["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])


@pytest.mark.parametrize(
    "changes", [(strings_for_ids,), (strings_in_annotations,), (strings_for_ids, strings_in_annotations)]
)
def test_category_ids_as_strings_are_the_same_numbers_on_both_sides(coco, edited, changes):
    found = read_coco(edited(lambda content: [change(content) for change in changes] and None))
    assert found.categories == coco.categories
    for image, wanted in zip(found.images, coco.images, strict=True):
        assert [i.label for i in image.instances] == [i.label for i in wanted.instances]


def as_pairs(polygon):
    return [list(pair) for pair in zip(polygon[::2], polygon[1::2], strict=True)]


@pytest.mark.parametrize(
    "written",
    [
        lambda polygons: [as_pairs(polygon) for polygon in polygons],
        lambda polygons: as_pairs(polygons[0]),
        lambda polygons: polygons[0],
    ],
    ids=["polygons of pairs", "one polygon of pairs", "one polygon without its list"],
)
def test_polygons_of_other_tools_are_the_same_masks(edited, written):
    polygons = [[2.5, 3, 20, 4.5, 18, 30, 4, 28]]

    def change(content, value):
        first(content)["segmentation"] = value

    wanted, found = (
        read_coco(edited(lambda content, value=value: change(content, value)))
        for value in (polygons, written(polygons))
    )
    one, other = (decode_masks(coco.images[0], coco.images[0].instances) for coco in (wanted, found))
    assert np.array_equal(one, other) and one[0].any()


def test_file_names_of_other_systems_are_found(root, coco, edited):
    def change(content):
        for image in content["images"]:
            image["file_name"] = ".\\" + image["file_name"].upper()

    assert [image.path for image in read_coco(edited(change)).images] == [image.path for image in coco.images]


def test_categories_that_differ_are_named():
    ours, theirs = [Category(1, "cat"), Category(2, "dog")], [Category(1, "cat"), Category(2, "hound")]
    check_same_categories(ours, Path("a.json"), ours, Path("b.json"))
    with pytest.raises(UserError, match=r"b\.json and a\.json differ in 1 categories \(id 2 is 'hound' .* 'dog'"):
        check_same_categories(ours, Path("a.json"), theirs, Path("b.json"))
    with pytest.raises(UserError, match=r"id 2 is 'absent'"):
        check_same_categories(ours, Path("a.json"), ours[:1], Path("b.json"))


# ---- samples


def samples(coco, seed=0, **options):
    return TrainingSamples(coco, DetectionData(image_size=(32, 40), **options), PLAIN, seed)


def test_a_sample_depends_on_seed_epoch_and_index_alone(coco):
    def equal(one, other):
        return torch.equal(one.pixels, other.pixels) and torch.equal(one.target["masks"], other.target["masks"])

    one = samples(coco)[(3, 1)]
    torch.manual_seed(99)
    assert equal(one, samples(coco)[(3, 1)])
    assert not equal(one, samples(coco)[(4, 1)])
    assert not equal(one, samples(coco, seed=1)[(3, 1)])


def test_samples_leave_the_global_generator_alone(coco):
    before = torch.get_rng_state()
    samples(coco)[(0, 0)]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("scale", [(0.3, 0.3), (1.0, 1.0), (2.5, 2.5)])
def test_masks_boxes_and_pixels_move_together(coco, scale):
    dataset = samples(coco, resize_scale=scale, hflip=0.5, vflip=0.5)
    seen = 0
    for epoch in range(6):
        sample = dataset[(epoch, 0)]
        assert sample.pixels.shape == (3, 32, 40) and sample.target["masks"].shape[1:] == (32, 40)
        tight = torch.from_numpy(boxes_of(sample.target["masks"].numpy())).float()
        torch.testing.assert_close(sample.target["boxes"], tight, rtol=0, atol=1.0)  # of resized masks: whole pixels
        rows, cols = sample.size
        assert sample.pixels[:, rows:].abs().sum() == sample.pixels[:, :, cols:].abs().sum() == 0
        for mask in sample.target["masks"]:
            inner = mask & (torch.nn.functional.max_pool2d((~mask)[None].float(), 3, 1, 1)[0] == 0)
            if inner.any():
                assert sample.pixels.amax(0)[inner].mean() > 0.7  # shapes are bright, the ground below 0.2
                seen += 1
    assert seen or scale[0] < 1


def test_crowds_and_objects_out_of_sight_are_not_learned(edited):
    part = edited(lambda content: first(content).update(iscrowd=1))
    image = read_coco(part).images[0]
    placement = place_whole(image.height, image.width, (48, 64))
    assert len(target_on(image, placement)["labels"]) == len(image.instances) - 1
    away = placement._replace(height=480, width=640, top=432, left=576)
    assert len(target_on(image, away)["labels"]) == 0


def test_an_image_without_objects_is_a_sample(edited):
    def empty(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 5]

    target = samples(read_coco(edited(empty)))[(0, 0)].target
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 32, 40)


def test_an_unreadable_image_is_replaced_and_reported(tmp_path, write_coco):
    root = write_coco(tmp_path)
    (root / "train" / "001.png").write_bytes(b"no image")
    coco = read_coco(Part(root / "train", root / "annotations" / "instances_train.json"))
    batch = collate([samples(coco)[(0, index)] for index in (0, 1)])
    assert len(batch) == 2 and [Path(entry.path).name for entry in batch.unreadable] == ["001.png"]
    whole = WholeImages(coco, DetectionData(image_size=32), PLAIN)
    batch = collate_readable([whole[0], whole[1], whole[2]])
    assert batch.indices == [0, 2] and len(batch.unreadable) == 1


def test_a_place_without_readable_images_near_it_refuses_the_batch_outside_the_worker(tmp_path, write_coco):
    root = write_coco(tmp_path)
    for path in (root / "train").iterdir():
        Image.new("RGB", (10, 12)).save(path)
    coco = read_coco(Part(root / "train", root / "annotations" / "instances_train.json"))
    loader = make_loader(samples(coco), [[(0, 0), (0, 1)]], collate, workers=1, pin=False)
    with pytest.raises(
        UserError, match=r"^4 images in a row.*\.png \(it is 10x12, .* are for 64x48\); check them and their json"
    ) as error:
        next(iter(loader))
    assert "Traceback" not in str(error.value)


def test_an_image_of_another_size_than_annotated_is_unreadable(tmp_path, write_coco):
    root = write_coco(tmp_path)
    Image.new("RGB", (10, 12)).save(root / "train" / "000.png")
    coco = read_coco(Part(root / "train", root / "annotations" / "instances_train.json"))
    with pytest.raises(UnreadableImage, match="it is 10x12, but its annotations are for 64x48"):
        read_checked(coco.images[0], 3)


def test_a_batch_splits_into_consecutive_parts(coco):
    batch = collate([samples(coco)[(0, index)] for index in range(3)])
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
    assert parts[1].indices == [2] and parts[1].targets[0] is batch.targets[2]


# ---- scores


def test_truth_against_itself_is_perfect(coco):
    scores = average_precision(coco, coco_results(coco, detections_of_truth(coco)))
    for kind in ("bbox", "segm"):
        assert scores[kind]["AP"] == scores[kind]["AP50"] == scores[kind]["AP75"] == 1.0
        assert scores[kind]["APl"] is None  # no object is larger than 96 x 96
        assert set(scores[kind]["per_class"]) == {"bar", "frame", "disc"}
        assert all(values["AP"] == values["AR"] == 1.0 for values in scores[kind]["per_class"].values())


@pytest.mark.parametrize("name", [lambda n: n, lambda n: f"object {n}"], ids=["from 0", "strings"])
def test_scores_do_not_depend_on_the_annotations_ids(edited, name):
    def rename(content):
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = name(number)

    coco = read_coco(edited(rename))
    scores = average_precision(coco, coco_results(coco, detections_of_truth(coco)))
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == 1.0


def test_nothing_found_scores_zero(coco):
    assert average_precision(coco, [])["segm"]["AP"] == 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content.update(annotations=[]), "has no annotations; there is nothing to score"),
        (lambda content: [a.update(iscrowd=1) for a in content["annotations"]] and None, "every object as a crowd; "),
    ],
    ids=["no annotations", "crowds alone"],
)
def test_a_set_with_nothing_to_score_against_is_refused_before_a_training_and_by_its_dry_run(
    edited, change, message, configure_detection
):
    part = edited(change)
    config = configure_detection(f"data.val_annotations={part.annotations}", f"data.val_images={part.images}")
    for refusing in (lambda: average_precision(read_coco(part), []), lambda: print_plan(config, 1)):
        with pytest.raises(UserError, match=message):
            refusing()


def test_scores_equal_pycocotools_called_by_hand(coco, tmp_path, capsys):
    rng = np.random.default_rng(0)
    found = []
    for detections in detections_of_truth(coco):
        boxes = detections.boxes + torch.from_numpy(rng.normal(0, 2, detections.boxes.shape)).float()
        scores = torch.from_numpy(rng.random(len(boxes))).float()
        labels = torch.where(torch.from_numpy(rng.random(len(boxes)) < 0.2), 1, detections.labels)
        masks = [np.roll(mask, rng.integers(-3, 4, 2), (0, 1)) for mask in decode(detections.codes)]
        found.append(Detections(detections.image_index, boxes, scores, labels, encode_masks(np.stack(masks))))
    results = coco_results(coco, found)
    ours = average_precision(coco, results)
    assert capsys.readouterr().out == ""
    (tmp_path / "results.json").write_text(json.dumps(results))

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(coco.path))
    for kind in ("bbox", "segm"):
        trimmed = json.loads((tmp_path / "results.json").read_text())
        if kind == "segm":
            for result in trimmed:
                del result["bbox"]
        evaluation = COCOeval(truth, truth.loadRes(trimmed), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
        expected = [None if value == -1 else pytest.approx(value) for value in evaluation.stats]
        assert [ours[kind][name] for name in names] == expected
        one_by_one = [ours[kind]["per_class"][name] for name in coco.names]
        for category, values in zip(coco.categories, one_by_one, strict=True):
            evaluation.params.catIds = [category.id]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            expected = [None if value == -1 else pytest.approx(value) for value in evaluation.stats]
            assert [values[name] for name in names] == expected
        assert 0 < ours[kind]["AP"] < 1


def decode(codes):
    from pycocotools import mask

    return mask.decode(codes).astype(bool).transpose(2, 0, 1)


# ---- photos that are stored on their side


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sides_of", ["upright", "stored"])
def test_boxes_hold_their_objects_whatever_the_orientation(tmp_path, orientation, sides_of):
    """A bright object in a photo with a tag, annotated on the upright picture or, by the json's sides, as stored."""
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[3:9, 5:20] = 255
    exif = Image.Exif()
    exif[274] = orientation
    (tmp_path / "train").mkdir()
    Image.fromarray(stored).save(tmp_path / "train" / "a.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "train" / "a.jpg") as image:
        seen = np.asarray(ImageOps.exif_transpose(image)).mean(-1) > 128
    drawn = stored.mean(-1) > 128 if sides_of == "stored" and orientation > 4 else seen
    rows, cols = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    x, y, w, h = (int(v) for v in (cols[0], rows[0], cols[-1] - cols[0] + 1, rows[-1] - rows[0] + 1))
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": drawn.shape[0], "width": drawn.shape[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "segmentation": polygon}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    record = read_coco(Part(tmp_path / "train", tmp_path / "a.json")).images[0]
    pixels = np.asarray(read_checked(record, 3)).mean(-1) > 128
    assert np.array_equal(pixels, decode_masks(record, record.instances)[0])
    check_size(record, header_of(record.path))


def exact_box(polygon, placement, size):
    """The box of a rectangle's visible part on the canvas, by arithmetic."""
    (height, width), (rows, cols) = size, placement.visible
    x, y = polygon[0::2] * placement.width / width, polygon[1::2] * placement.height / height
    x1, x2 = (np.clip(edge - placement.left, 0, cols) for edge in (x.min(), x.max()))
    y1, y2 = (np.clip(edge - placement.top, 0, rows) for edge in (y.min(), y.max()))
    x1, x2 = (cols - x2, cols - x1) if placement.hflip else (x1, x2)
    y1, y2 = (rows - y2, rows - y1) if placement.vflip else (y1, y2)
    return torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32)


@pytest.mark.parametrize("side", [8, 16, 40])
@pytest.mark.parametrize("kind", ["polygon", "code"])
def test_boxes_of_small_objects_are_exact_whatever_the_jitter(side, kind):
    """At 8 pixels on the canvas a box from resized masks has an IoU of 0.85 with the exact one."""
    size, rng = (300, 400), np.random.default_rng(side)
    for trial in range(40):
        place = place_jittered(*size, (256, 320), DetectionData(resize_scale=(0.3, 1.5), vflip=0.5),
            torch.Generator().manual_seed(trial))  # fmt: skip
        extent = side * np.array([size[1] / place.width, size[0] / place.height])
        corner = rng.uniform(0, np.array([400, 300]) - extent)
        if kind == "code":
            corner, extent = corner.round(), extent.round().clip(1)
        (x, y), (w, h) = corner, extent
        polygon = np.array([x, y, x + w, y, x + w, y + h, x, y + h])
        shape = (polygon,)
        if kind == "code":
            mask = np.zeros((1, *size), dtype=bool)
            mask[:, int(y) : int(y + h), int(x) : int(x + w)] = True
            shape = encode_masks(mask)[0]["counts"]
        instance = Instance(1, 1, (x, y, w, h), shape, None, False)
        record = CocoImage(1, Path("x.png"), *size, (instance,))
        expected = exact_box(polygon, place, size)
        for masks in (True, False):
            target = target_on(record, place, masks=masks)
            if len(target["boxes"]) and (expected[0, 2:] - expected[0, :2]).min() > 2:
                assert box_iou(target["boxes"], expected).item() >= 0.99, (trial, masks, target["boxes"], expected)
            else:
                assert (expected[0, 2:] - expected[0, :2]).min() <= 2


def test_a_polygon_is_cut_as_shapely_would():
    """An L, whose visible part in the window is the end of one arm; and a C, of which the window shows nothing."""
    window = np.array([4.0, 0.0, 10.0, 10.0])
    arm = cut_polygon(np.array([[0, 0], [6.5, 0], [6.5, 1.5], [2, 1.5], [2, 8], [0, 8]], dtype=float), window)
    assert arm.min(axis=0).tolist() == [4, 0] and arm.max(axis=0).tolist() == [6.5, 1.5]
    assert not len(cut_polygon(np.array([[0, 0], [3, 0], [3, 9]], dtype=float), window))


def test_a_box_head_takes_annotations_without_a_mask_and_a_mask_head_names_the_option(edited):
    part = edited(lambda content: first(content).update(segmentation=[]))
    with pytest.raises(UserError, match=r"has no segmentation.*boxes alone with model\.head=faster_rcnn"):
        read_coco(part)
    coco = read_coco(part, masks=False)
    image = coco.images[0]
    target = target_on(image, place_whole(image.height, image.width, (48, 64)), masks=False)
    assert target.keys() == {"boxes", "labels"}
    assert target["boxes"].tolist() == [[x, y, x + w, y + h] for x, y, w, h in (i.box for i in image.instances)]
    annotation = coco.truth()["annotations"][0]
    assert "segmentation" not in annotation and annotation["area"] > 0


def test_images_without_objects_are_left_out_as_detectron2_does(edited):
    def empty(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 5]
        for annotation in content["annotations"]:
            annotation["iscrowd"] = int(annotation["image_id"] == 15)

    coco = read_coco(edited(empty))
    assert [image.id for image in with_objects(coco).images] == [image.id for image in coco.images][2:]
