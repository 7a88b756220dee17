# BEiT's settings for its self-supervised ViT-B, with an MAE encoder: learning rate 7e-4 and LayerScale from 0.1; layer
# decay 0.65, drop path 0.1 and relative positions are the same in both recipes. MAE's absolute positions and its fused
# qkv bias stay, for its encoder was trained with them (BEiT's has neither). Not measured here.
#
#   python transfer/segmentation/train_net.py configs/segmentation/beit_like_vit_base_upernet_160k_ade20k_512x512.py \
#       --weights mae_pretrain_vit_base.pth --work-dir runs/beit_like --cfg-options data_root=data/ADEChallengeData2016
_base_ = ["mae_vit_base_upernet_160k_ade20k_512x512.py"]

model = dict(backbone=dict(layer_scale=0.1))
optim_wrapper = dict(optimizer=dict(lr=7e-4))
