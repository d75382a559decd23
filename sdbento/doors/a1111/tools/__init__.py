"""What the web UI's clients ask for beside images: settings, lists, enlargements, infotexts."""
