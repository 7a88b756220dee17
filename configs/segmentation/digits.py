# The embedded digit scenes with the nano encoder, on a CPU: 48 x 48 pixels; plain, stripes, checks, dots and digit.
#
#   python transfer/segmentation/train_net.py configs/segmentation/digits.py \
#       --weights runs/pretrain/encoder.safetensors --work-dir runs/segmenter --cfg-options data_root=PATH/segmentation
#
# A variable below can be set under --cfg-options like any key; what is computed from it follows.
_base_ = ["_base_/upernet.py", "_base_/runtime.py", "_base_/labelled_folders.py"]

data_root = "runs/demo/data/segmentation"
num_classes = 5
reduce_zero_label = False  # the variables that describe the labels are explained in own_data.py
label_values = None
ignored_values = None
seg_map_suffix = ".png"
on_error = "skip"
size = "nano"
width = 128  # of the encoder's tokens
head_width = 64
crop_size = 48
patch_size = 8
batch_size = 8
workers = 0
iterations = 300
warmup = max(2, iterations // 20)
lr = 1.2e-3

model = dict(
    data_preprocessor=dict(  # ImageNet's mean and std, as the digits' other configs
        size=(crop_size, crop_size), mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]
    ),
    backbone=dict(
        size=size,
        image_size=crop_size,
        patch_size=patch_size,
        drop_path=0.0,
        relative_positions="none",
        layer_scale=None,
    ),
    neck=dict(embed_dim=width, rescales=[2, 1, 0.5, 0.25]),  # patches of 8: the strides are 4, 8, 16, 32 as ever
    decode_head=dict(in_channels=[width] * 4, channels=head_width, num_classes=num_classes),
    auxiliary_head=dict(in_channels=width, channels=head_width, num_classes=num_classes),
    test_cfg=dict(mode="whole"),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(crop_size, crop_size), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(crop_size, crop_size)),  # no flips: a digit has one way up
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
labels = dict(
    data_root=data_root,
    num_classes=num_classes,
    reduce_zero_label=reduce_zero_label,
    label_values=label_values,
    ignored_values=ignored_values,
    seg_map_suffix=seg_map_suffix,
    on_error=on_error,
)
loading = dict(batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)
train_dataloader = dict(**loading, dataset=dict(**labels, pipeline=train_pipeline))
val_dataloader = dict(**loading, dataset=dict(**labels, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=lr, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="MAECoreLayerDecay",
    paramwise_cfg=dict(layer_decay_rate=0.9, paper_bug=False),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=warmup),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=warmup, end=iterations, by_epoch=False),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
