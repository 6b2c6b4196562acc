// The before/after slider of Measure: what gradio has in only one of its versions. Nothing runs until it is moved.
(function () {
    document.addEventListener("input", function tomeSamplerCompare(event) {
        const slider = event.target;
        const box = slider.closest ? slider.closest(".tome-sampler-compare") : null;
        if (box !== null && slider.type === "range") {
            box.style.setProperty("--split", slider.value + "%");
        }
    });
})();
