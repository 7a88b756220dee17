# The same training; tested at six scales, each as it is and mirrored, the probabilities averaged.
#
#   python transfer/segmentation/train_net.py configs/segmentation/mae_vit_huge_upernet_160k_ade20k_504x504_ms.py \
#       --eval-only runs/ade20k --work-dir runs/ade20k_ms --cfg-options data_root=data/ADEChallengeData2016
#
# mmseg's tools/test.py does it with --tta. Scales are factors on the size of a single-scale test.
_base_ = ["mae_vit_huge_upernet_160k_ade20k_504x504.py"]

crop_size = 504
scales = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
tta_model = dict(type="SegTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(int(4 * crop_size * s), int(crop_size * s)), keep_ratio=True) for s in scales],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
