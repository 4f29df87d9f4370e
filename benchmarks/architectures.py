"""The timm architectures of benchmarks/coverage.py, by family."""

MODELS: dict[str, str] = {
    "resnet": "resnet18 resnet26d resnet50 resnet50_gn wide_resnet50_2 resnetv2_50 "
    "resnetblur18 resnetrs50 ecaresnet26t seresnet33ts seresnet50 legacy_seresnet18",
    "resnext": "resnext26ts resnext50_32x4d seresnext26d_32x4d",
    "res2net": "res2net50_26w_4s res2next50",
    "resnest": "resnest14d resnest26d",
    "regnet": "regnetx_002 regnety_002 regnetz_b16 regnetv_040",
    "densenet": "densenet121 densenetblur121d",
    "vgg": "vgg11_bn vgg13",
    "inception": "inception_v3 inception_v4 inception_resnet_v2 xception41 inception_next_tiny "
    "legacy_xception xception71 xception65p",
    "dla": "dla34 dla46_c dla60_res2net",
    "dpn": "dpn48b dpn68",
    "hrnet": "hrnet_w18_small",
    "selecsls": "selecsls42b",
    "vovnet": "ese_vovnet19b_dw vovnet39a ese_vovnet39b",
    "cspnet": "cspresnet50 cspdarknet53 darknet17 cs3darknet_s darknet53 darknetaa53 "
    "cs3sedarknet_l cs3edgenet_x cspresnext50",
    "mobilenet": "mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small "
    "mobilenetv4_hybrid_medium mnasnet_small spnasnet_100 fbnetc_100 lcnet_050 "
    "tinynet_e mobileone_s0 lcnet_100 mnasnet_100 semnasnet_075 "
    "tf_mobilenetv3_small_075",
    "hardcore": "hardcorenas_a hardcorenas_f",
    "efficientnet": "efficientnet_b0 efficientnetv2_rw_t tf_efficientnetv2_b0 efficientnet_lite0 "
    "mixnet_s gc_efficientnetv2_rw_t tf_mixnet_s",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "repvgg": "repvgg_a0 repghostnet_050 repvit_m0_9 repvit_m1",
    "rexnet": "rexnet_100 rexnetr_100",
    "nfnet": "nfnet_l0 dm_nfnet_f0 nf_regnet_b0 nf_resnet26 eca_nfnet_l0",
    "convnext": "convnext_atto convnext_atto_ols convnextv2_atto",
    "edgenext": "edgenext_xx_small",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "fastvit": "fastvit_t8 fastvit_sa12 fastvit_mci0",
    "starnet": "starnet_s1 starnet_s050",
    "vit": "vit_tiny_patch16_224 vit_small_patch16_224 vit_tiny_r_s16_p8_224 "
    "vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 "
    "vit_base_patch16_rpn_224 vit_medium_patch16_gap_240 "
    "vit_wee_patch16_reg1_gap_256 vitamin_small_224 flexivit_small "
    "vit_small_patch16_rope_224 vit_betwixt_patch16_reg1_gap_256 "
    "vit_xsmall_patch16_clip_224",
    "eva": "eva02_tiny_patch14_224",
    "deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224",
    "beit": "beit_base_patch16_224 beitv2_base_patch16_224",
    "cait": "cait_xxs24_224",
    "xcit": "xcit_nano_12_p16_224",
    "swin": "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swin_s3_tiny_224 "
    "swinv2_cr_tiny_224",
    "coat": "coat_tiny coat_lite_tiny",
    "coatnet": "coatnet_pico_rw_224 coatnet_nano_rw_224",
    "twins": "twins_pcpvt_small twins_svt_small",
    "pvt": "pvt_v2_b0",
    "maxvit": "maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256",
    "levit": "levit_128s levit_conv_128s",
    "crossvit": "crossvit_tiny_240 crossvit_9_dagger_240",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32 convmixer_1024_20_ks9_p14",
    "mixer": "mixer_s32_224 gmixer_12_224",
    "resmlp": "resmlp_12_224 resmlp_24_224",
    "gmlp": "gmlp_ti16_224",
    "poolformer": "poolformer_s12 poolformerv2_s12",
    "metaformer": "caformer_s18 convformer_s18",
    "volo": "volo_d1_224",
    "tnt": "tnt_s_patch16_224",
    "visformer": "visformer_tiny",
    "pit": "pit_ti_224 pit_ti_distilled_224",
    "nest": "nest_tiny",
    "gcvit": "gcvit_xxtiny",
    "davit": "davit_tiny davit_small",
    "focalnet": "focalnet_tiny_srf focalnet_tiny_lrf",
    "efficientformer": "efficientformer_l1 efficientformerv2_s0",
    "efficientvit": "efficientvit_b0 efficientvit_m0",
    "tiny_vit": "tiny_vit_5m_224 tiny_vit_11m_224",
    "mvitv2": "mvitv2_tiny mvitv2_small",
    "hiera": "hiera_tiny_224 hiera_small_abswin_256",
    "hgnet": "hgnet_tiny hgnetv2_b0 hgnet_small",
    "nextvit": "nextvit_small nextvit_base",
    "rdnet": "rdnet_tiny",
    "mambaout": "mambaout_femto mambaout_kobe",
    "tresnet": "tresnet_m",
    "sequencer": "sequencer2d_s",
    "others": "haloregnetz_b botnet26t_256 lambda_resnet26t lamhalobotnet50ts_256 skresnet18 "
    "resnet32ts gernet_s convnext_zepto_rms shvit_s1 swiftformer_xs "
    "skresnext50_32x4d",
}
