"""Computing what the engine decides: the only caller of UNet, VAE and ControlNets."""
