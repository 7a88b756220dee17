# Street scenes from one camera, as in CamVid (480x360, 11 classes, 0 is void): every image has the same size, so it is
# tested whole, and nothing is upside down or far away, so that scales change less than in the web's photos.
#
#   python transfer/segmentation/train_net.py configs/segmentation/camvid.py --weights runs/mine \
#       --work-dir runs/camvid --cfg-options data_root=data/camvid
#
# Layout and variables are those of small_data.py: images/{training,validation}, annotations/{training,validation} and
# classes.txt below data_root.
_base_ = ["small_data.py"]

data_root = "data/camvid"
num_classes = 11
reduce_zero_label = True
crop_size = 192

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(4 * crop_size, crop_size), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(crop_size, crop_size), cat_max_ratio=0.9),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
model = dict(
    decode_head=dict(num_classes=num_classes),
    auxiliary_head=dict(num_classes=num_classes),
    test_cfg=dict(_delete_=True, mode="whole"),
)
labels = dict(data_root=data_root, num_classes=num_classes, reduce_zero_label=reduce_zero_label)
train_dataloader = dict(dataset=dict(**labels, pipeline=train_pipeline))
val_dataloader = dict(dataset=labels)
test_dataloader = val_dataloader
