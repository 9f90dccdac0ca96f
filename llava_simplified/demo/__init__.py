"""The embedded default: small pretrained models and a captioned picture set, from package registries."""
