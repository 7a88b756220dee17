# A few hundred of your own images, on one machine, with or without a GPU: ViT-Tiny and a narrow UperNet.
#
#   python transfer/segmentation/train_net.py configs/segmentation/small_data.py \
#       --weights runs/mine --work-dir runs/segmenter \
#       --cfg-options data_root=data/own num_classes=5
#
# Layout of data_root and the variables that describe the labels (num_classes, reduce_zero_label, label_values,
# ignored_values, seg_map_suffix, on_error) are those of own_data.py, where they are explained.
_base_ = ["own_data.py"]

size = "tiny"
patch_size = 12  # the weights file's
width = 192  # of the encoder's tokens; 128 nano, 384 small, 768 base, 1024 large
head_width = 64
crop_size = 192  # images are resized to this shortest side, and cropped to it in training
batch_size = 8
workers = 2
iterations = 2000
warmup = max(2, iterations // 20)
lr = 5e-4

model = dict(
    data_preprocessor=dict(size=(crop_size, crop_size), test_cfg=dict(size_divisor=4 * patch_size)),
    backbone=dict(size=size, image_size=crop_size, patch_size=patch_size),
    neck=dict(embed_dim=width, rescales=[2, 1, 0.5, 0.25]),  # patches of 12: the strides are 6, 12, 24, 48
    decode_head=dict(in_channels=[width] * 4, channels=head_width),
    auxiliary_head=dict(in_channels=width, channels=head_width),
    test_cfg=dict(crop_size=(crop_size, crop_size), stride=(crop_size * 2 // 3, crop_size * 2 // 3)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(4 * crop_size, crop_size), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(crop_size, crop_size), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(4 * crop_size, crop_size), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: the truth keeps its size
    dict(type="PackSegInputs"),
]
loading = dict(num_workers=workers, persistent_workers=workers > 0)
train_dataloader = dict(batch_size=batch_size, **loading, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(**loading, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=lr), paramwise_cfg=dict(layer_decay_rate=0.75))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=warmup),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=warmup, end=iterations, by_epoch=False),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
