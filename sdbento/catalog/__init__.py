"""Models, ControlNets and LoRAs by name: what they are, which files they have. Loads no weights."""
