// What gradio cannot do: the before/after slider of Measure, and the group under the pointer on a map.
// Nothing runs until the pointer is there.
(function () {
    document.addEventListener("input", function tomeSamplerCompare(event) {
        const box = event.target.closest && event.target.closest(".tome-sampler-compare");
        if (box && event.target.type === "range") {
            box.style.setProperty("--split", event.target.value + "%");
        }
    });

    // data-groups: for each token, row by row, the number of the token that stands for it (32 bits, little-endian)
    function tomeSamplerGroups(box) {
        const bytes = Uint8Array.from(atob(box.dataset.groups), (c) => c.charCodeAt(0));
        const view = new DataView(bytes.buffer);
        return Array.from({length: bytes.length / 4}, (_, i) => view.getUint32(4 * i, true));
    }

    document.addEventListener("pointermove", function tomeSamplerHover(event) {
        const box = event.target.closest && event.target.closest(".tome-sampler-over");
        if (!box) {
            return;
        }
        const [h, w] = box.dataset.grid.split(",").map(Number);
        const place = box.getBoundingClientRect();
        const x = Math.min(Math.max(Math.floor((event.clientX - place.left) / place.width * w), 0), w - 1);
        const y = Math.min(Math.max(Math.floor((event.clientY - place.top) / place.height * h), 0), h - 1);
        box.tomeSamplerGroups = box.tomeSamplerGroups || tomeSamplerGroups(box);
        const groups = box.tomeSamplerGroups;
        const group = groups[y * w + x];
        if (group === box.tomeSamplerShown) {
            return;
        }
        box.tomeSamplerShown = group;
        const pen = box.querySelector("canvas").getContext("2d");
        pen.clearRect(0, 0, w, h);
        let size = 0;
        groups.forEach(function (other, i) {
            if (other === group) {
                size += 1;
                pen.fillStyle = i === group ? "rgba(255, 255, 255, .95)" : "rgba(255, 140, 0, .85)";
                pen.fillRect(i % w, Math.floor(i / w), 1, 1);
            }
        });
        const said = box.parentElement.querySelector(".tome-sampler-group");
        said.textContent = size === 1
            ? `Token (${x}, ${y}) was kept by itself.`
            : `Token (${x}, ${y}) is one of ${size} merged into (${group % w}, ${Math.floor(group / w)}), drawn white.`;
    });
})();
