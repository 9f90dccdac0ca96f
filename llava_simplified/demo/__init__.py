"""The demo: small pretrained models and emoji drawings with captions, from package registries."""
