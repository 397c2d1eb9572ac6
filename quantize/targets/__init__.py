"""Other runtimes: what their formats can hold, and which plans fit them."""
