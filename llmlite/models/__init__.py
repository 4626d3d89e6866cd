"""What llmlite knows of models: where things are (families), how big they are (size), how to load and to rebuild them."""
