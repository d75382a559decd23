"""Pictures and bytes, pictures and latents' sizes, control images."""
