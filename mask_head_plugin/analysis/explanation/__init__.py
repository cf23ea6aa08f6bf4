"""Pictures that explain Mask R-CNN on a user's image; ``explain`` draws all of them."""
