// What saves waiting, and nothing that a form can not do: copying a command, and what changes by itself.
"use strict";
(() => {
  let source = null;
  let later = 0;

  const copying = (root) => {
    if (!navigator.clipboard) return;
    for (const button of root.querySelectorAll("button.copy")) {
      button.hidden = false;
      button.onclick = async () => {
        const text = button.parentElement.querySelector("code").textContent;
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      };
    }
  };

  // What is the same thing on both sides: by its key where it has one, else by its place.
  const keyOf = (node) => node.nodeType === Node.ELEMENT_NODE ? node.dataset.key : undefined;
  const alike = (one, other) => one && one.nodeName === other.nodeName && keyOf(one) === keyOf(other);

  // Makes one part of a page like another and touches only what differs: what has the focus keeps it, and what was said is not
  // said again.
  const renew = (old, fresh) => {
    let at = old.firstChild;
    for (const node of [...fresh.childNodes]) {
      const key = keyOf(node);
      let there = at;
      if (key !== undefined && !alike(there, node)) {
        there = [...old.children].find((one) => alike(one, node));
        if (there) old.insertBefore(there, at);
      }
      if (!alike(there, node)) {
        old.insertBefore(node, at);
        continue;
      }
      if (there === at) at = at.nextSibling;
      if (node.nodeType !== Node.ELEMENT_NODE) {
        if (there.data !== node.data) there.data = node.data;
        continue;
      }
      // A button that copies was shown here.
      if (there.isEqualNode(node) || there.classList.contains("copy")) continue;
      for (const { name } of [...there.attributes]) if (!node.hasAttribute(name)) there.removeAttribute(name);
      for (const { name, value } of [...node.attributes]) if (there.getAttribute(name) !== value) there.setAttribute(name, value);
      renew(there, node);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  };

  const renewed = (place, fresh) => {
    const focused = document.activeElement;
    renew(place, fresh);
    // Who was moved has lost it.
    if (focused && focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
  };

  const said = (text) => {
    const state = document.getElementById("live-state");
    if (!state) return;
    state.hidden = false;
    if (state.textContent !== text) state.textContent = text;
  };
  const AGAIN = "not live; trying again";
  const SIGNED_OUT = "not live: you are signed out; load the page again";

  const stop = () => {
    clearTimeout(later);
    if (source) source.close();
    source = null;
  };

  // One connection, while the page is looked at: a browser has few for one host.
  const live = () => {
    const place = document.querySelector("[data-live]");
    if (!place || document.hidden) return stop();
    if (source && source.place === place) return;
    stop();
    const own = new EventSource(place.dataset.live);
    source = own;
    own.place = place;
    own.onmessage = (event) => {
      // The server's own markup, escaped there.
      const fresh = document.createElement("template");
      fresh.innerHTML = event.data;
      renewed(place, fresh.content);
      said("live");
    };
    own.onerror = async () => {
      said(AGAIN);
      if (own.readyState !== EventSource.CLOSED) return;
      // The browser has given it up: it was answered otherwise than with a stream. The answer says why.
      const asking = new AbortController();
      const answer = await fetch(place.dataset.live, { signal: asking.signal }).catch(() => null);
      asking.abort();
      if (source !== own) return;
      if (answer && (answer.status === 401 || answer.status === 403)) return said(SIGNED_OUT);
      source = null;
      later = setTimeout(live, 5000);
    };
  };

  // A run is looked at anew by a part of its page: it is renewed in place, too, as long as it goes on.
  document.addEventListener("htmx:beforeSwap", (event) => {
    const { target, serverResponse, xhr } = event.detail;
    if (!target || target.id !== "run" || !event.detail.requestConfig.path.endsWith("?again=1")) return;
    const fresh = new DOMParser().parseFromString(serverResponse, "text/html").getElementById("run");
    if (!fresh) {
      // What is refused blanks nothing.
      event.detail.shouldSwap = false;
      return said(xhr.status === 401 || xhr.status === 403 ? SIGNED_OUT : AGAIN);
    }
    if (!fresh.hasAttribute("hx-get")) return;
    // What is typed stays.
    for (const input of target.querySelectorAll("input:not([type=hidden])")) {
      const same = fresh.querySelector(`form[action="${input.form.getAttribute("action")}"] [name="${input.name}"]`);
      if (same) same.replaceWith(input.cloneNode(true));
    }
    event.detail.shouldSwap = false;
    renewed(target, fresh);
    said("live");
  });

  const begin = () => { copying(document); live(); };
  document.addEventListener("DOMContentLoaded", begin);
  document.addEventListener("visibilitychange", live);
  document.addEventListener("htmx:afterSettle", begin);
  window.addEventListener("pagehide", stop);
})();
