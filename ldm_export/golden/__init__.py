"""Golden outputs: requests, images and component outputs that torch computed at export."""
