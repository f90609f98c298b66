"""What a person looks at: our model beside its references, as numbers with a verdict, and as pictures.

references   kernels_ref and transformers, loaded and run beside ours on the same images
compare      bounds, and the stages of a model against a reference   (imports references)
gradients    those of every parameter, against a reference        (imports references)
views        colours, attention, cosines, differences of every patch (imports references)
report       views as a panel, and as a page: page.html              (imports views)

The commands `align` and `show` are above and bring flags and printing; nothing here imports a command.
"""
