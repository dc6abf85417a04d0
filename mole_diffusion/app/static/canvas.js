// Boxes and painted masks on a picture, one colour for each LoRA. Talks with the page by two text fields: what the page
// wants shown comes by `moleCanvas.show`, what was drawn goes into the field #mole-drawn as JSON.
(() => {
  const SIDE = 128; // of a painted mask
  const state = { names: [], colours: [], boxes: {}, painted: {}, picture: null, own: 0, tool: "box" };
  let canvas, names, said, drag = null, current = null;

  const name = () => state.names[state.own];
  const layer = (of) => {
    if (!state.painted[of]) {
      state.painted[of] = document.createElement("canvas");
      state.painted[of].width = state.painted[of].height = SIDE;
    }
    return state.painted[of];
  };

  function tell() {
    const painted = {};
    for (const [of, mask] of Object.entries(state.painted)) {
      const pixels = mask.getContext("2d").getImageData(0, 0, SIDE, SIDE).data;
      if (pixels.some((value, index) => index % 4 === 3 && value)) painted[of] = mask.toDataURL("image/png");
    }
    const boxes = Object.fromEntries(Object.entries(state.boxes).filter(([, own]) => own.length));
    const empty = !Object.keys(painted).length && !Object.keys(boxes).length;
    const field = document.querySelector("#mole-drawn textarea, #mole-drawn input");
    if (!field) return;
    field.value = empty ? "" : JSON.stringify({ boxes, painted });
    field.dispatchEvent(new Event("input", { bubbles: true }));
    said.textContent = state.names
      .map((of) => [of, (state.boxes[of] || []).length, of in painted])
      .filter(([, count, mask]) => count || mask)
      .map(([of, count, mask]) => `${of}: ${[count ? `${count} box${count > 1 ? "es" : ""}` : "", mask ? "painted" : ""].filter(Boolean).join(", ")}`)
      .join("; ") || "No regions: every LoRA is found by itself.";
  }

  function paint() {
    const pen = canvas.getContext("2d"), { width, height } = canvas;
    pen.clearRect(0, 0, width, height);
    pen.globalAlpha = 1;
    if (state.picture && state.picture.complete) pen.drawImage(state.picture, 0, 0, width, height);
    state.names.forEach((of, index) => {
      const mask = state.painted[of];
      if (mask) {
        const tinted = document.createElement("canvas");
        tinted.width = tinted.height = SIDE;
        const brush = tinted.getContext("2d");
        brush.drawImage(mask, 0, 0);
        brush.globalCompositeOperation = "source-in";
        brush.fillStyle = state.colours[index];
        brush.fillRect(0, 0, SIDE, SIDE);
        pen.globalAlpha = 0.6;
        pen.drawImage(tinted, 0, 0, width, height);
      }
      for (const [left, top, right, bottom] of state.boxes[of] || []) {
        const box = [left * width, top * height, (right - left) * width, (bottom - top) * height];
        pen.fillStyle = pen.strokeStyle = state.colours[index];
        pen.globalAlpha = 0.35;
        pen.fillRect(...box);
        pen.globalAlpha = 1;
        pen.lineWidth = 3;
        pen.strokeRect(...box);
        pen.font = "bold 18px sans-serif";
        pen.fillText(of, box[0] + 6, box[1] + 22);
      }
    });
  }

  function choose(index) {
    state.own = index;
    current = null;
    [...names.children].forEach((button, at) => button.setAttribute("aria-checked", at === index));
  }

  function list() {
    names.replaceChildren(...state.names.map((of, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("role", "radio");
      button.textContent = of;
      button.style.borderColor = state.colours[index];
      button.style.setProperty("--own", state.colours[index]);
      button.addEventListener("click", () => choose(index));
      return button;
    }));
    choose(Math.min(state.own, Math.max(0, state.names.length - 1)));
  }

  const place = (event) => {
    const frame = canvas.getBoundingClientRect();
    const part = (value) => Math.min(1, Math.max(0, value));
    return [part((event.clientX - frame.left) / frame.width), part((event.clientY - frame.top) / frame.height)];
  };

  function stroke([x, y]) {
    const brush = layer(name()).getContext("2d");
    brush.globalCompositeOperation = state.tool === "rub" ? "destination-out" : "source-over";
    brush.fillStyle = "#fff";
    brush.beginPath();
    brush.arc(x * SIDE, y * SIDE, SIDE / 16, 0, 7);
    brush.fill();
  }

  function begin(event) {
    if (!name()) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    drag = place(event);
    if (state.tool !== "box") stroke(drag);
    else (state.boxes[name()] ||= []).push((current = [...drag, ...drag]));
    paint();
  }

  function go(event) {
    if (!drag) return;
    const here = place(event);
    if (state.tool !== "box") stroke(here);
    else {
      [current[0], current[2]] = [drag[0], here[0]].sort((a, b) => a - b);
      [current[1], current[3]] = [drag[1], here[1]].sort((a, b) => a - b);
    }
    paint();
  }

  function end() {
    if (!drag) return;
    drag = null;
    if (state.tool === "box" && (current[2] - current[0] < 0.02 || current[3] - current[1] < 0.02)) {
      state.boxes[name()].pop(); // a click, no box
      current = null;
    }
    paint();
    tell();
  }

  function key(event) {
    if (!name()) return;
    const own = (state.boxes[name()] ||= []);
    const step = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] }[event.key];
    current = own.includes(current) ? current : own[own.length - 1];
    if (event.key === "Enter") own.push((current = [0.25, 0.25, 0.75, 0.75]));
    else if (event.key === "Delete" && current) own.splice(own.indexOf(current), 1);
    else if (step && current) {
      const moved = [...current];
      for (const at of event.shiftKey ? [2, 3] : [0, 1, 2, 3]) moved[at] = Math.round((moved[at] + step[at % 2]) * 100) / 100;
      const fits = moved.every((value) => value >= 0 && value <= 1) && moved[2] - moved[0] > 0.04 && moved[3] - moved[1] > 0.04;
      if (fits) current.splice(0, 4, ...moved);
    } else return;
    event.preventDefault();
    paint();
    tell();
  }

  function start() {
    canvas = document.getElementById("mole-canvas");
    names = document.getElementById("mole-names");
    said = document.getElementById("mole-said");
    canvas.addEventListener("pointerdown", begin);
    canvas.addEventListener("pointermove", go);
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
    canvas.addEventListener("keydown", key);
    document.querySelectorAll("#mole-board [data-tool]").forEach((button) => button.addEventListener("click", () => {
      state.tool = button.dataset.tool;
      document.querySelectorAll("#mole-board [data-tool]").forEach((other) => other.setAttribute("aria-pressed", other === button));
    }));
    document.querySelectorAll("#mole-board [data-act]").forEach((button) => button.addEventListener("click", () => {
      const gone = button.dataset.act === "clear" ? [...state.names] : [name()];
      for (const of of gone) {
        delete state.boxes[of];
        delete state.painted[of];
      }
      paint();
      tell();
    }));
    list();
    paint();
    tell();
  }

  // A mask comes in shades of grey; here its shade is how opaque it is.
  function asLayer(url, done) {
    const image = new Image();
    image.onload = () => {
      const mask = document.createElement("canvas");
      mask.width = mask.height = SIDE;
      const brush = mask.getContext("2d");
      brush.drawImage(image, 0, 0, SIDE, SIDE);
      const pixels = brush.getImageData(0, 0, SIDE, SIDE);
      for (let at = 0; at < pixels.data.length; at += 4) {
        pixels.data[at + 3] = Math.min(pixels.data[at], pixels.data[at + 3]);
        pixels.data[at] = pixels.data[at + 1] = pixels.data[at + 2] = 255;
      }
      brush.putImageData(pixels, 0, 0);
      done(mask);
    };
    image.src = url;
  }

  window.moleCanvas = {
    lookAtPictures() {
      // On a phone the pictures lie far below the button, which is always in sight.
      if (window.innerWidth <= 640) document.getElementById("mole-gallery").scrollIntoView({ block: "center" });
    },
    show(text) {
      if (!text) return;
      const given = JSON.parse(text);
      state.names = given.names;
      state.colours = given.colours;
      if (given.boxes) {
        state.boxes = given.boxes;
        state.painted = {};
      }
      for (const of of Object.keys(state.boxes)) if (!state.names.includes(of)) delete state.boxes[of];
      for (const of of Object.keys(state.painted)) if (!state.names.includes(of)) delete state.painted[of];
      if (given.picture) {
        state.picture = new Image();
        state.picture.onload = () => canvas && paint();
        state.picture.src = given.picture;
      }
      if (canvas) list();
      for (const [of, url] of Object.entries(given.painted || {})) {
        asLayer(url, (mask) => {
          state.painted[of] = mask;
          if (canvas) {
            paint();
            tell();
          }
        });
      }
      if (canvas) {
        paint();
        tell();
      }
    },
  };

  const waiting = setInterval(() => {
    if (document.getElementById("mole-canvas")) {
      clearInterval(waiting);
      start();
    }
  }, 100);
})();
