# Your own label maps on a GPU, with an MAE ViT-B and the settings of the ADE20K recipe; a template: copy and change it.
#
#   python transfer/segmentation/check_data.py configs/segmentation/own_data.py \
#       --cfg-options data_root=data/own num_classes=5
#   python transfer/segmentation/train_net.py configs/segmentation/own_data.py \
#       --weights mae_pretrain_vit_base.pth --work-dir runs/own --cfg-options data_root=data/own num_classes=5
#
# data_root holds images/{training,validation}/* (any format), annotations/{training,validation}/* of the same names
# (one channel of 1 to 32 bits, or a palette's indices; 255 is ignored) and, if you like, classes.txt (a line
# value<TAB>name for each class; without it the classes are called after their values).
# A few hundred images, or no GPU: small_data.py. A variable below can be set under --cfg-options like any key; what is
# computed from it follows.
_base_ = ["_base_/upernet.py", "_base_/runtime.py", "_base_/labelled_folders.py"]

data_root = "data/own"
num_classes = 2
# what the values of the label maps mean: the classes are 0..num_classes-1; with reduce_zero_label=True, as in ADE20K, 0
# is void and they are 1..num_classes; label_values=[0,255] is the value of each class ([0,[1,2],255] joins 1 and 2)
reduce_zero_label = False
label_values = None
ignored_values = None  # values without a class; None: 255, or 65535 where 255 is a class
seg_map_suffix = ".png"  # what a label map's name has in place of the image's suffix
on_error = "skip"  # an unreadable image is named, counted and left out; "raise" stops the run
size = "base"
patch_size = 16  # the weights file's
width = 768  # of the encoder's tokens; 192 tiny, 384 small, 1024 large
head_width = 512
crop_size = 512  # images are resized to this shortest side, and cropped to it in training
batch_size = 8
workers = 4
iterations = 20000
warmup = max(2, iterations // 20)
lr = 1e-4

model = dict(
    data_preprocessor=dict(size=(crop_size, crop_size), test_cfg=dict(size_divisor=2 * patch_size)),
    backbone=dict(size=size, image_size=crop_size, patch_size=patch_size),
    neck=dict(embed_dim=width),  # patches of 16: the strides are 4, 8, 16, 32
    decode_head=dict(in_channels=[width] * 4, channels=head_width, num_classes=num_classes),
    auxiliary_head=dict(in_channels=width, channels=head_width, num_classes=num_classes),
    test_cfg=dict(mode="slide", crop_size=(crop_size, crop_size), stride=(crop_size * 2 // 3, crop_size * 2 // 3)),
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
labels = dict(
    data_root=data_root,
    num_classes=num_classes,
    reduce_zero_label=reduce_zero_label,
    label_values=label_values,
    ignored_values=ignored_values,
    seg_map_suffix=seg_map_suffix,
    on_error=on_error,
)
loading = dict(num_workers=workers, persistent_workers=workers > 0)
train_dataloader = dict(batch_size=batch_size, **loading, dataset=dict(**labels, pipeline=train_pipeline))
val_dataloader = dict(batch_size=1, **loading, dataset=dict(**labels, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=lr), paramwise_cfg=dict(layer_decay_rate=0.65))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=warmup),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=warmup, end=iterations, by_epoch=False),
]
train_cfg = dict(max_iters=iterations, val_interval=2000)
