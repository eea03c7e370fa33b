"""jrope behind other tools' interfaces; importing these imports no such tool."""
