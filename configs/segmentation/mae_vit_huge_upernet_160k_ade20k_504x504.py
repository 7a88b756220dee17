# UperNet with MAE ViT-H (patches of 14) on ADE20K, 160k steps of 16 images. Nobody has published a recipe or a result:
# learning rate, layer decay and drop path carry on from ViT-L's and are a starting point. 504 pixels are 36 patches, so
# the four maps have strides 3.5, 7, 14 and 28; taps are the last blocks of the four quarters (7, 15, 23, 31).
#
#   torchrun --nproc_per_node 8 transfer/segmentation/train_net.py \
#       configs/segmentation/mae_vit_huge_upernet_160k_ade20k_504x504.py --weights mae_pretrain_vit_huge.pth \
#       --work-dir runs/ade20k_huge --cfg-options data_root=data/ADEChallengeData2016 batch_size=2
_base_ = ["mae_vit_base_upernet_160k_ade20k_512x512.py"]

crop_size = 504

model = dict(
    data_preprocessor=dict(size=(crop_size, crop_size), test_cfg=dict(size_divisor=28)),
    backbone=dict(size="huge", image_size=crop_size, patch_size=14, drop_path=0.3, checkpointing=True),
    neck=dict(embed_dim=1280),
    decode_head=dict(in_channels=[1280] * 4, channels=1280),
    auxiliary_head=dict(in_channels=1280),
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
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

optim_wrapper = dict(optimizer=dict(lr=8e-5), paramwise_cfg=dict(layer_decay_rate=0.8))
