# UperNet with MAE ViT-L on ADE20K, 160k steps of 16 images. The paper (A.4) reports 53.6 mIoU and names neither
# learning rate nor layer decay nor drop path; the three here are a starting point, from a third party's unconfirmed
# config, to be searched as the paper did. Not reproduced here. Taps are the published ones of a ViT-L: 7, 11, 15, 23.
#
#   torchrun --nproc_per_node 8 transfer/segmentation/train_net.py \
#       configs/segmentation/mae_vit_large_upernet_160k_ade20k_512x512.py --weights mae_pretrain_vit_large.pth \
#       --work-dir runs/ade20k_large --cfg-options data_root=data/ADEChallengeData2016 batch_size=2
_base_ = ["mae_vit_base_upernet_160k_ade20k_512x512.py"]

model = dict(
    backbone=dict(size="large", drop_path=0.2),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=9e-5), paramwise_cfg=dict(layer_decay_rate=0.75))
